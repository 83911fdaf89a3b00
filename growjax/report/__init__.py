"""Reports: runs to one self-contained HTML page with plots and tables."""

# ruff: noqa: E402 - a missing package is named before it is imported

from growjax.extras import require


require("growjax.report", "matplotlib")

from growjax.report.arms import Arm as Arm
from growjax.report.arms import Part as Part
from growjax.report.figures import cost_figure as cost_figure
from growjax.report.figures import loss_figure as loss_figure
from growjax.report.page import Plot as Plot
from growjax.report.page import Section as Section
from growjax.report.page import Table as Table
from growjax.report.page import write_page as write_page
from growjax.report.rows import read_summary as read_summary
from growjax.report.rows import write_summary as write_summary
