"""How ranks find each other and exchange tensors: the only place that calls torch.distributed."""
