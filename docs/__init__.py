"""The pages of this folder are the documentation; ``docs.tools`` builds and checks them."""
