"""``nano``: the small base model of the quickstart, with the script that trains it anew. README.md is its model card."""
