"""The lab: techniques measured side by side. Importing this costs nothing."""
