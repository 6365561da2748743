"""An ordinary FedML project, dense: a small network on digits.

`start.py` in this folder starts a server and its clients over one of FedML's transports. To start
them by hand, run ``python main.py --cf fedml_config.yaml --rank 0 --role server``, and a client for
each further rank.
"""

import logging

import digits
import fedml
from fedml import FedMLRunner
from net import Net

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    args = fedml.init(check_env=False, should_init_logs=False)
    device = fedml.device.get_device(args)
    dataset = digits.load(args.client_num_in_total, args.batch_size)
    FedMLRunner(args, device, dataset, Net()).run()
