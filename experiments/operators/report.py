from experiments.study import Page


def page(*a, **k):
    return Page("t", ["x"])
