"""The rules, one module per family; every module here is imported when a rule is first looked up."""
