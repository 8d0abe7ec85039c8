"""The local engine: one set of weights, one device; policy and learner."""
