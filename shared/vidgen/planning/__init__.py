"""How many GPUs, what they cost, how long people wait: `vidgen plan`.

`scaling` is the autoscaler's arithmetic, pure and free of dependencies; `gpus` and `arrivals` are what goes in;
`simulation` plays the policy of the workers and of KEDA with simpy; `report` and `plot` say what came out.
"""
