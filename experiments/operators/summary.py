def summarise(*a, **k):
    return []
