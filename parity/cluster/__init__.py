"""Ranks that a cluster's launcher has started, perhaps on several hosts: `parity worker`.

    rank 0     the command itself: session, oracle, verdict, results (`head`), and the agent of its own rank
    any rank   an agent (`agent`): starts this rank's processes, one a framework, and relays what they say

They talk over one TCP connection an agent (`wire`). Where each rank is, it reads from its environment (`place`).
"""
