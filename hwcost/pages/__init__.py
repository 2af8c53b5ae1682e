"""Text tables, charts and the HTML page of a study."""
