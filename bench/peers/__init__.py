"""The programs that chatterd is measured against."""
