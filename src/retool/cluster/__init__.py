"""The cluster engine: our rollout, formats, sandbox and grading inside verl. Nothing else imports verl or ray."""
