"""The program around the method: options, batches, files, the report, what is printed."""
