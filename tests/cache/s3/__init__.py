"""The S3 tier."""
