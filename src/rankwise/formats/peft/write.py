def write(adapter, path, rank=None):
    raise NotImplementedError
