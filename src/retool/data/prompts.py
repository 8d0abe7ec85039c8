"""Text that every data set's prompt shares."""

SYSTEM_PROMPT = r"Solve the problem. Put the final answer in \boxed{}."
