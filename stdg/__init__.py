__version__ = "0.1.0"


def __getattr__(name):
    "`stdg.predict`, loaded when it is asked for: `import stdg` alone stays quick."
    if name == 'predict':
        from .inference import predict
        return predict
    raise AttributeError(f"module 'stdg' has no attribute {name!r}")
