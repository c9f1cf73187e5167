"""Pages to look at, made from what runs and evaluations have written; trains and loads nothing."""
