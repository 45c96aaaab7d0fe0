class Resident:
    def __init__(self):
        self.d = {}

    def put(self, k, t):
        self.d[k] = dict(t)

    def prefetch(self, ks, device):
        pass

    def take(self, k, device):
        return self.d.pop(k, None)

    def peek(self, k):
        return self.d.get(k)

    def drop(self, k):
        self.d.pop(k, None)

    def keys(self):
        return list(self.d)


Host = Disk = Store = Resident
