"""Conversations: messages, what each model holds of them, and the command line's chat."""
