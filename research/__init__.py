"""The methods: data, training, monitors, dynamics, reports; where models and parallelism meet."""
