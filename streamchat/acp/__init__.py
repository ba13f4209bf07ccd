"""The Agent Client Protocol (ACP): a chat as an agent of an editor, over stdin and stdout."""
