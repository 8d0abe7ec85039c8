"""Find the final answer, judge it, turn the verdict into a reward."""
