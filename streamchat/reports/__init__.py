"""Result pages of tables and charts, rendered for terminal, HTML and JSON."""
