"""The types of adapters that ``convert --type`` makes: one file each."""
