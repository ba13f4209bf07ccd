"""The app in a browser, through textual-serve: each tab is a separate process."""
