"""What the `chatterd` command does: a module for each, of which `chatterd.cli` loads one."""
