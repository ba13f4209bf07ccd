"""Pages of results: tables, charts, and their forms for a terminal, HTML, Markdown and JSON."""
