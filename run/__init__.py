"""How does a command start, stop and go on? Nothing here knows a model, a task or a page."""
