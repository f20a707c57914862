"""Workers whose model is replaced by a calibrated delay, so that many of them fit on two cores.

Gateway, queues, schedulers, block pools, preprocessing, sampling and transport are the real ones;
only the matrix arithmetic is not done: a step sleeps for as long as a performance model says, and
gives tensors of the right shape. Nothing outside `bench` knows of it.
"""
