"""What happened: report.json, and report.html, a page that shows it."""
