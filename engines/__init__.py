"""The deployment side: build, bundle, sessions, generation, cascade. Runs without torch and without the exporter."""
