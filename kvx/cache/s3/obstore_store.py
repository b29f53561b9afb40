def open_store(config): raise NotImplementedError
