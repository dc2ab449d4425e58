"""Certified training: pure pieces for a training loop, and a loop made of them.

    schedules     radius, kappa, beta and learning rate as functions of the step
    models        the networks of the CROWN-IBP paper, and a ResNet
    losses        natural, robust and adversarial losses, per example
    fusion        the robust loss at a cost that does not grow with the number of classes
    step          one training step, on one device or many, by pmap or jit
    data          data sets, batches by key, augmentation
    checkpoints   what survives a killed run
    loop          training from data to a verified error
    configuration every field of a run with its default
    runs          from a configuration to a folder with a certified network
    evaluation    errors while training, and certified ones
    progress      a progress bar, and TensorBoard events

Nothing here certifies: a loss is made of bounds, and a certificate of a trained network comes from `jaxbound.certify`.
"""
