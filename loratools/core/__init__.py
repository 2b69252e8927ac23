"""The nouns every room shares: Update, Adapter, the verbs over kinds."""
