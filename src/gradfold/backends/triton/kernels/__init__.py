"""What Triton compiles. Python by its syntax only: type checkers are not shown these files."""
