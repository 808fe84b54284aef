import sys; sys.argv=['proto.py','--epochs','1','--n','400']
exec(open('/work/lab/pairs/proto.py').read().replace("torch.save(head","#"))
import torch
for nm,(F1,it1) in dict(train=(F_,items),val=(Fv,itv)).items():
    f,b,c,img,si,oi,y,oimg=batch_of(F1[:8],it1[:8],False); head.oimg=oimg
    for mode in (True,False):
        head.train(mode); out,_,_=head(f,b,c,img,si,oi); print(nm,mode,loss_of(out,y,None).item(), f.mean().item(), f.std().item(), f.shape, f.is_contiguous(), f.stride())
it=itv[0]
print(it[0][:3],it[1],it[2],it[4],it[5], len(it[3]))
f,b,c,img,si,oi,y,oimg=batch_of(Fv[:1],itv[:1],False); head.oimg=oimg
head.eval(); out,_,_=head(f,b,c,img,si,oi); sc=scores(out); n=len(it[0])
print(y.sum(), torch.stack([si,oi],1)[:5], sc.shape)
o_=sc.amax(1).argsort(descending=True)
pr=Prediction(it[0],it[1],torch.ones(n),torch.stack([si,oi],1)[o_],sc[o_].detach(),it[5])
print(pr.pairs[:5], pr.predicates[:5].argmax(1))
ev=metrics.Evaluator('predcls',P,protocol='strict')
tr=SceneGraph(it[0],it[1],it[2],it[5],it[4]); ev.update(pr,tr); print({k:v for k,v in ev.compute().items() if k=='R@50'})
