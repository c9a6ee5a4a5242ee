"""Models and data sets that ship with fastok for demonstrations and tests."""
