"""What can be wrong with a request for a plan."""


class PlanError(RuntimeError):
    """A model that cannot be found or traced, a setting out of range, a budget that nothing fits; says the way out."""
