"""How chats, tool calls and tool answers look as tokens."""
