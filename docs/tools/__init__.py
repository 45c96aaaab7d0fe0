"""What makes the documentation site out of pages, code and notebook, and checks it. README.md says how."""
