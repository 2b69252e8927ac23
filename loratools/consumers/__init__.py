"""Programs that receive adapters: what each reads, refuses, ignores and misreads, as data and small predicates."""
