"""`streamchat replay --chaos SEED`: disturbs a run at seeded moments, and checks that nothing grows or is lost."""
