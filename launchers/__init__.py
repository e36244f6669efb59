"""absl mains: how experiments are started and where they run."""
