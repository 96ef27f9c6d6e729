import cvjax  # noqa: F401  (Ctrl-C while an experiment starts)
