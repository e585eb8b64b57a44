"""Attention flow by networkx."""

import networkx
import numpy as np


def by_networkx(run, trace):
    """The naive run's matrices, with real capacities, in networkx' own maximum flow."""
    graph = networkx.DiGraph()
    state = {place: (0, place) for place in range(run.size)}  # the latest state of every token
    history = [dict(state)]
    for number, s in enumerate(run.sublayers):
        read, new = history[s.keys_state], dict(state)
        mean = s.A.mean(0).numpy()
        for i, query in enumerate(s.queries):
            capacity = {}
            capacity[state[query]] = 0.5
            for j, key in enumerate(s.keys):
                capacity[read[key]] = capacity.get(read[key], 0) + 0.5 * mean[i, j]
            new[query] = (number + 1, query)
            for to, value in capacity.items():
                graph.add_edge(new[query], to, capacity=float(value))
        state = new
        history.append(dict(state))
    source, found = state[run.read], np.zeros(run.size)
    for place in range(run.size):
        sink = (0, place)
        if sink == source:
            found[place] = 1
        elif sink in graph and source in graph:
            found[place] = networkx.maximum_flow_value(graph, source, sink)
    return found
