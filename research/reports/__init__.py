"""What a person sees of a run: report.html, figures, and tables over several runs."""
