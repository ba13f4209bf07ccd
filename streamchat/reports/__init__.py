"""Result pages of tables and charts, rendered for terminal, HTML, Markdown and JSON."""
