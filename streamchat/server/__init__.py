"""OpenAI's API on one loaded model and any number of saved sessions: `streamchat serve`."""
