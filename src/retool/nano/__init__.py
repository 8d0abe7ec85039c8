"""``nano``: the small base model of the quickstart, and the script that trains it anew. README.md is its card."""
