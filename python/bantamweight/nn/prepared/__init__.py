"""The prepared forms of torch's modules, one file a family; `nn.prepare` puts them in place."""
