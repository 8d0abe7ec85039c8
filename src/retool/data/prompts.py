"""Text that every data set's prompt shares."""

from retool.types import Message

SYSTEM_PROMPT = r"Solve the problem. Put the final answer in \boxed{}."


def prompt_messages(question: str) -> list[Message]:
    """The chat up to the model's first turn."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
