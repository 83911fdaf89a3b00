"""Reports: runs to one self-contained HTML page with plots and tables."""

# ruff: noqa: E402 - a missing package is named before it is imported

from growjax.extras import require


require("growjax.report", "matplotlib")

from growjax.report.figures import arms_figure as arms_figure
from growjax.report.figures import cost_figure as cost_figure
from growjax.report.page import Plot as Plot
from growjax.report.page import Section as Section
from growjax.report.page import Table as Table
from growjax.report.page import write_page as write_page
